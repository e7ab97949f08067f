"""What is done with a site, a product or the rows of the batch, in the words of the column `reason`. These entries need no advice."""

from approx_compile.reasons.reason import Template

# --- sampled products ---

SAMPLED = Template("sampled", "{product}: {method}{groups}")
COUPLED = Template("coupled", "through the entries the output kept")
BY_KERNEL = Template("by-kernel", "{words} by {kernel}")
KERNEL_REFUSED = Template("kernel-refused", "{words} by inductor: {why}")
BUT_BY_INDUCTOR = Template("but-by-inductor", "but by inductor")
PREDICTED = Template("predicted", "predicted {speedup:.2f}x at ratio {ratio:g}, {break_even}")
MEASURED = Template("measured", "measured {speedup:.2f}x at ratio {ratio:g}")
WITH_PRODUCERS = Template("with-producers", "{words}, {speedup:.2f}x with the sites before it")
TOGETHER = Template("together", "{words} together")
SHARES_INDICES = Template("shares-indices", "shares its indices with {others}")
PRODUCERS_NARROWED = Template("producers-narrowed", "{names} these channels only")
NARROWED = Template("narrowed", "only the {kept} of {size} channels that {consumer} keeps")
SKIPS_ZEROS = Template("skips-zeros", "skips what {source} dropped")
UNITS_CHOSEN = Template("units-chosen", "{method}: {kept} of {size} units, which {consumer} reads")
UNITS_READ = Template("units-read", "reads the units that {producer} makes")
UNITS_PREDICTED = Template("units-predicted", "predicted {speedup:.2f}x with {consumer}")
GRADIENTS_SKIP_ZEROS = Template("gradients-skip-zeros", "its gradients skip what later sites dropped")

# --- replaced gradients ---

OF_PRODUCT = Template("of-product", "{product}: {words}")
REST_EXACT = Template("rest-exact", "the rest exact: {why}")
ZEROS = Template("zeros", "zeros in its place")
EMPTY_BATCH = Template("empty-batch", "zeros in its place: the batch is empty")
RANDOM = Template("random", "random numbers in its place, standard deviation {std}")
MAX = Template("max", "max, {kept} of {size} entries of the output gradient{tiles}{by}")
MAX_KERNEL_REFUSED = Template("max-kernel-refused", "{words}, by inductor: {why}")

# --- rows of the batch ---

TOKENS_OF = Template("tokens-of", "tokens of {layers}")
TOKENS_OF_REGIONS = Template("tokens-of-regions", "{regions} between ops that mix tokens")
ON_TOKENS = Template("on-tokens", "on the tokens kept")
ON_ROWS = Template("on-rows", "on the rows kept")
BACKWARD_ON_ROWS = Template("backward-on-rows", "backward on {kept}")
WHOLE_BACKWARD = Template("whole-backward", "the whole backward pass")
ROWS_END = Template("rows-end", "rows end where {stops}")
ROWS_END_ABOVE = Template("rows-end-above", "{why}, so that all above it runs on all rows")
