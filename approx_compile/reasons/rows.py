"""Why the backward pass runs on all rows of the batch, or on all rows from some op on."""

from approx_compile.reasons.reason import NOTHING_TO_DO, Template

_OUTSIDE = "move the op out of the compiled model"
_BY_SAMPLE = f"Write it with ops of torch that work on each sample by itself, or {_OUTSIDE}."

# --- of a whole graph ---

NOT_TRAINING = Template(
    "not-training",
    "no module is in training mode",
    "Call `model.train()` before the training step. Evaluation is always exact, and there is nothing to do for it.",
)
NO_SAMPLES = Template(
    "no-samples", "the graph has no input with samples", "Pass the batch to the compiled model as a tensor with the samples along its first axis."
)
SMALL_BATCH = Template("small-batch", "a batch of {size}, min_k is {least}", "Use a larger batch, or set a smaller `min_k` of `grad`.")
FIXED_BATCH = Template(
    "fixed-batch",
    "the model fixes the size of the batch to {size}",
    "Leave `mark_static` and `dynamic=False` out, and write shapes with `-1` or `x.shape[0]` in place of the batch's size.",
)
FIXED_BATCH_TRACED = Template(
    "fixed-batch-traced",
    "the model, or an op that is traced for known sizes alone, fixes the size of the batch to {size}",
    "Write shapes with `-1` or `x.shape[0]` in place of the batch's size.",
)
FIXED_BATCH_CODE = Template(
    "fixed-batch-code",
    "its compiled code is for a batch of {size} only",
    "Write shapes with `-1` or `x.shape[0]` in place of the batch's size.",
)
BATCH_ASSUMED = Template(
    "batch-assumed",
    "its code assumes {guard} of the batch's size {size}",
    "Write shapes and conditions so that they hold for any size of the batch.",
)
SYMBOL_FAILS = Template(
    "symbol-fails",
    "it can't be compiled with a symbol for the batch's size ({error})",
    'Write the model so that it compiles for any size of the batch; `torch._dynamo.mark_dynamic(x, 0)` and `backend="inductor"` show the same error.',
)
SYMBOL_BREAKS = Template(
    "symbol-breaks",
    "with a symbol for the batch's size Dynamo can't trace all of it",
    "Leave out what reads the size of the batch as a Python number: `TORCH_LOGS=graph_breaks` shows where.",
)
DEFECT = Template("defect", "a defect of approx_compile ({error}); please report it", "Please report it, with the model. The step is exact until then.")
NO_ROW_PRODUCT = Template(
    "no-row-product",
    "no product of the backward pass depends on rows of the output's gradient",
    NOTHING_TO_DO + "without products on rows there is no work to leave out. If the loss is a part of the compiled model, compile the model without it.",
)
FEW_FLOPS_ON_ROWS = Template(
    "few-flops-on-rows",
    "only {share:.0%} of the backward pass's FLOPs could run on some of the rows",
    NOTHING_TO_DO + 'so small a part does not pay. `policy: "always"` runs it on rows all the same.',
)
SHORT_BACKWARD = Template(
    "short-backward",
    "a backward pass of {mflop:.3g} MFLOP is over before its rows would be chosen",
    NOTHING_TO_DO + "the model or the batch is small, and choosing rows takes longer than it saves. A larger batch pays sooner.",
)
GATHERING_COSTS = Template(
    "gathering-costs",
    "choosing and gathering rows would take about {cost} us, leaving out {left_out} of them saves {saved} us (must exceed {least} us)",
    NOTHING_TO_DO + "the step would take longer, or gain too little. A larger batch, or wider layers, pay sooner.",
)

# --- samples depend on each other ---

CROSS_SAMPLE = Template(
    "cross-sample",
    "a sum over the batch goes back to its rows, as in BatchNorm",
    'GroupNorm and LayerNorm keep samples apart. `grad: {"axis": "rows", "batch_norm": "approximate"}` goes through BatchNorm, with a bias.',
)
NOT_LINEAR = Template(
    "not-linear",
    "{op} is not linear in the gradient",
    "Use a torch op whose gradient is linear in it, or apply the function to the model's outputs outside of the compiled model.",
)
NONLINEAR_BELOW = Template(
    "nonlinear-below",
    "{what}, below a compiled graph, is not known to be linear in the gradient",
    "Compile it together with the rest of the model, or leave the hook or the function out of the way of the gradient.",
)
UNKNOWN_OP = Template("unknown-op", "{op} is not known to keep samples apart", _BY_SAMPLE)
SAMPLES_COMPARED = Template(
    "samples-compared",
    "{op} reads similarities of samples, or another tensor with the batch along two axes",
    "Compare samples at the end of the model only, as a contrastive loss does: rows are chosen below it.",
)
WHOLE_FORWARD_BATCH = Template("whole-forward-batch", "{op} takes the forward pass's batch as a whole", _BY_SAMPLE)
ALONG_BATCH = Template("along-batch", "{op} runs along the batch", "Make the batch the first axis, if this axis was not meant to be the batch.")
BATCH_MEAN = Template(
    "batch-mean", "a mean over the batch divides by the number of rows", "Take the mean over the batch outside of the compiled model, as in its loss."
)
SIZE_AS_NUMBER = Template("size-as-number", "{op} uses the batch's size as a number", "Take the mean over the batch outside of the compiled model.")
RANDOM_FOR_BATCH = Template(
    "random-for-batch", "random numbers are drawn for the whole batch", "Draw them in the forward pass, or outside of the compiled model."
)
DROPOUT_IN_ATTENTION = Template(
    "dropout-in-attention",
    "attention with dropout draws its mask by position in the batch",
    "Set the attention's `dropout_p` to 0; dropout after it keeps samples apart.",
)
SAMPLE_WEIGHT = Template(
    "sample-weight", "the convolution's weight depends on the sample", "Use one weight for all samples, or leave the layer: it runs on all rows."
)

# --- tokens ---

FEW_FLOPS_ON_TOKENS = Template(
    "few-flops-on-tokens",
    "only {share:.0%} of the backward pass's FLOPs could run on some of the tokens",
    'Nothing to do where samples are chosen in their place. `grad: {axis: "tokens"}` asks for tokens all the same.',
)
NO_TOKEN_REGION = Template(
    "no-token-region",
    "no linear layer's gradients depend on tokens",
    NOTHING_TO_DO + 'tokens are chosen where linear layers are applied to each of them. Rows of the batch may be worth it: `grad: {axis: "rows"}`.',
)
TOKENS_MIXED = Template("tokens-mixed", "{op} mixes tokens", NOTHING_TO_DO + "a region of tokens ends at what mixes them, such as attention.")
OUTSIDE_REGIONS = Template(
    "outside-regions",
    "in no region of tokens",
    NOTHING_TO_DO
    + "regions hold linear layers that are applied to each token. What mixes tokens is outside, as attention, and so are layers on pooled tokens, "
    "layers with little work, and those that a rule keeps exact.",
)

# --- samples are chosen, written or joined ---

_CHOICE = f"Choose samples before the model, or {_OUTSIDE}."
SAMPLES_BY_INDEX = Template(
    "samples-by-index",
    "samples are picked by index",
    "For entries of every sample write `x.gather(1, i)` or `x[torch.arange(len(x)), i]`; choose samples before the model.",
)
SAMPLES_WRITTEN = Template("samples-written", "samples are written by index", _CHOICE)
ONE_SAMPLE = Template("one-sample", "one sample is taken out of the batch", "Compute what depends on a single sample outside of the compiled model.")
ONE_SAMPLE_WRITTEN = Template("one-sample-written", "one sample is written to", "Compute what depends on a single sample outside of the compiled model.")
EVERY_NTH = Template("every-nth", "every n-th sample is taken out of the batch", _CHOICE)
EVERY_NTH_WRITTEN = Template("every-nth-written", "every n-th sample is written to", _CHOICE)
PART_OF_BATCH = Template("part-of-batch", "a part of the batch is taken out or written", _CHOICE)
BATCH_SPLIT = Template("batch-split", "the batch is split", _CHOICE)
BATCH_PADDED = Template("batch-padded", "the batch is padded", "Pad the batch before the model.")
BATCH_EXTENDED = Template("batch-extended", "something without samples is concatenated with the batch", "Concatenate along another axis, or before the model.")
KERNEL_AMONG_ROWS = Template(
    "kernel-among-rows", "a kernel chooses among the rows", "Do not ask for a sampled `grad_weight` by a kernel and for rows in the same layer."
)
ROWS_OVERWRITE = Template("rows-overwrite", "rows overwrite one another", "Use `index_add` or `index_put` with `accumulate=True`, which add up.")
ROWS_ALL_OVER = Template("rows-all-over", "rows are written to places of which it is not known whose sample they are", _BY_SAMPLE)

# --- the batch cannot be followed ---

_FIRST_AXIS = "Keep the batch as the first axis up to this op."
_VIEW = "Keep the batch an axis of its own, or merge it with the axes next to it only: `x.reshape(len(x), -1)`, `x.flatten(0, 1)`."
NOT_FIRST_AXIS = Template("not-first-axis", "{op}: the batch is not the first axis", _FIRST_AXIS)
NOT_LEADING_AXIS = Template("not-leading-axis", "{op}: the batch is not among the axes before the matrices'", _FIRST_AXIS)
BATCH_ELSEWHERE = Template("batch-elsewhere", "two operands hold the batch at different axes", "Give all operands the batch at the same axis.")
OPERAND_WITHOUT_SAMPLES = Template("operand-without-samples", "{op} has an operand without samples", "Expand the operand to the batch: `i.expand(len(x), -1)`.")
INDICES_APART = Template("indices-apart", "axes that are not adjacent are indexed", "Index adjacent axes, or use `gather`.")
ROWS_TIMES_ROWS = Template("rows-times-rows", "{op} multiplies rows with rows", _BY_SAMPLE)
BATCH_CONTRACTED = Template("batch-contracted", "{op} contracts the batch with something else", _BY_SAMPLE)
ROWS_ADDED = Template("rows-added", "{op} adds rows to a sum over rows", _BY_SAMPLE)
MAKES_ROWS = Template("makes-rows", "{op} makes a tensor of the batch's size from values without samples", _BY_SAMPLE)
TWO_BATCH_AXES = Template("two-batch-axes", "two axes of {op} have the batch's size", _BY_SAMPLE)
BATCH_MOVED = Template("batch-moved", "{op} moves the batch", _FIRST_AXIS)
BATCH_RESIZED = Template("batch-resized", "{op} changes the batch's size", _BY_SAMPLE)
VIEW_SPLITS = Template("view-splits", "a view splits the batch", _VIEW)
VIEW_MIXES = Template("view-mixes", "a view mixes the batch with other axes", _VIEW)
VIEW_DYNAMIC = Template("view-dynamic", "the batch is merged between two axes of dynamic size", _VIEW)
VIEW_UNIFORM = Template("view-uniform", "a view merges an axis that is the same for every sample with others", _VIEW)
MERGED_UNKNOWN = Template("merged-unknown", "the batch is merged with other axes in an order that is not known", _VIEW)
GRADIENT_MERGED = Template("gradient-merged", "a gradient spreads over the batch merged with other axes", _VIEW)
MEMORY_READ = Template("memory-read", "as_strided takes some entries of memory out", "Use slices, `select` or `gather` in place of `as_strided`.")
MEMORY_WRITTEN = Template(
    "memory-written", "as_strided_scatter writes to some entries of memory", "Use slices, `select` or `scatter` in place of `as_strided`."
)
COMPLEX_ALONG_BATCH = Template(
    "complex-along-batch", "the batch is the axis of the real and imaginary parts", "Make the last axis hold the real and imaginary parts."
)

# --- the variance of the whole gradient ---

_BY_NORMS = NOTHING_TO_DO + "samples are then chosen by the norms of the gradients at the outputs alone, as with `adaptive.probe` 0."
UNMEASURED_WRITES = Template("unmeasured-writes", "{op} has effects, so that the backward pass must run only once", _BY_NORMS)
UNMEASURED_COLLECTIVE = Template("unmeasured-collective", "{op} communicates with other processes, which may not measure in the same step", _BY_NORMS)
UNMEASURED_NO_PARAMETERS = Template("unmeasured-no-parameters", "the graph computes the gradient of no parameter", _BY_NORMS)
UNMEASURED_MEMORY = Template("unmeasured-memory", "there was not enough memory to run the backward pass on some of the rows and then on all", _BY_NORMS)
UNMEASURED_CUDA_GRAPHS = Template("unmeasured-cuda-graphs", "CUDA graphs reuse the memory of results", _BY_NORMS)
