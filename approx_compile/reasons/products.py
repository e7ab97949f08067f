"""Why a site or one of its products stays exact, is not replaced, or makes all of its channels."""

from approx_compile.reasons.reason import NOTHING_TO_DO, Template

# --- must stay exact ---

EVAL_MODE = Template(
    "eval-mode", "the module is in eval mode", "Call `model.train()` before the training step. Evaluation is always exact, and there is nothing to do for it."
)
NO_GRADIENT = Template(
    "no-gradient",
    "no gradient flows through it",
    NOTHING_TO_DO + "a product that is not trained has no backward pass. If it should be trained, check `requires_grad` of its weight.",
)
DTYPE = Template("dtype", "{dtype} products are not sampled", NOTHING_TO_DO + "only products of real floating-point numbers are sampled.")
UNTRACED_MODULE = Template(
    "untraced-module",
    "the module could not be traced back to the model, so a change of its train/eval mode would go unnoticed",
    "Make the layer a submodule of the compiled model, and call it as `self.layer(x)`.",
)
TENSOR_SUBCLASS = Template(
    "tensor-subclass",
    "the graph has {kind} inputs, whose products are distributed or packed",
    "Compile the part of the model that works on plain tensors; products of tensor subclasses stay exact.",
)
FUNC_TRANSFORM = Template(
    "func-transform", "inside a torch.func transform", "Call the layer outside of the function that `torch.func` transforms, if it is to be approximated."
)
CUSTOM_FUNCTION = Template(
    "custom-function",
    "inside a custom autograd.Function",
    "Write the layer with torch's own ops, if it is to be approximated: a custom backward is not changed.",
)
ONE_TENSOR = Template(
    "one-tensor",
    "both operands are views of one tensor",
    NOTHING_TO_DO + "the gradients of a tensor's product with itself cannot be told apart, and they stay exact.",
)
BACKWARD_NOT_UNDERSTOOD = Template(
    "backward-not-understood",
    "its backward pass is not understood",
    "Use a layer of `torch.nn` or a function of `torch.nn.functional`: here the gradients are not the products that the chain rule gives.",
)
SYMBOLIC_GROUPS = Template(
    "symbolic-groups", "the number of its groups is a symbol", "Give the convolution a fixed number of groups, if it is to be approximated."
)

NO_PRODUCT = Template(
    "no-product",
    "no rule holds for {name}, which is exact: with one row or one input Inductor computes it without a matrix product",
    NOTHING_TO_DO + "so small a product takes no time worth saving.",
)

# --- exact as asked, or because nothing could be left out ---

BY_SETTINGS = Template("by-settings", "exact by the settings", NOTHING_TO_DO + "nothing was asked for; a rule whose `layers` match it asks.")
COUPLED_TO_EXACT = Template(
    "coupled-to-exact", "the output it is coupled to is exact", "Give the gradient a method of its own (`grad_input`, `grad_weight`), or sample the output."
)
DYNAMIC_AXIS = Template(
    "dynamic-axis", "its contraction axis has a dynamic size", "Compile with fixed sizes (`torch.compile(..., dynamic=False)`), if the size does not change."
)
DYNAMIC_IMAGE = Template("dynamic-image", "its image has a dynamic size, for which Inductor gathers single channels only", "Set `group: 1`.")
NO_WEIGHT = Template("no-weight", "topk_weights needs a weight, and neither operand is one", "Use another method for it, such as `topk`.")
SHORT_AXIS = Template(
    "short-axis", "axis of {size}, min_k is {least}", NOTHING_TO_DO + "so short an axis leaves out too little to save time. A smaller `min_k` samples it."
)
KEEPS_ALL = Template("keeps-all", "keeps all {size} at ratio {ratio:g}, group {group}", "Set a smaller `ratio` or a smaller `group`.")

# --- exact by default, or because it would not pay ---

_ACCURACY = '; `policy: "always"` approximates the layer all the same.'
_RULE = 'A rule whose `layers` match the layer samples it: `rules: [{"layers": "NAME", "ratio": 0.5}]`.'
RAW_DATA = Template("raw-data", "fed with raw data", NOTHING_TO_DO + "a sampled first layer loses accuracy for little time" + _ACCURACY)
LAST_LAYER = Template("last-layer", "the last layer", NOTHING_TO_DO + "an error in the last layer reaches all gradients" + _ACCURACY)
KIND_BY_DEFAULT = Template("kind-by-default", "{kind}s are exact by default", _RULE)
AFTER_BATCH_NORM = Template("after-batch-norm", "fed by BatchNorm: exact by default", _RULE)
FEW_CHANNELS = Template("few-channels", "{size} contraction channels, fewer than the {least} of the default", _RULE)
NO_COST_MODEL = Template("no-cost-model", "no cost model for {device}", 'Set `policy: "always"`, which predicts no times.')
WOULD_NOT_PAY = Template(
    "would-not-pay",
    "would not pay: {words} ({missed})",
    NOTHING_TO_DO + "sampled, the layer would take more time, or save too little. A smaller `ratio`, a larger batch or a wider layer pays sooner.",
)

# --- a gradient is not replaced ---

MAX_WITHOUT_WEIGHT = Template("max-without-weight", "max is for products with a weight", "Use `zero` or `random` for it, or no replacement.")
MAX_CONV_INPUT = Template("max-conv-input", "max for grad_input is for linear layers", "Ask for `max` as `grad_weight` of convolutions only.")
MAX_BATCHED = Template("max-batched", "max is not for batched products", "Leave batched products out of the rule's `layers`.")
MAX_DYNAMIC = Template(
    "max-dynamic", "max: an operand has a dynamic size beside the batch", "Compile with fixed sizes beside the batch, if `max` is to replace the gradient."
)
MAX_TILE_LINEAR = Template(
    "max-tile-linear",
    "max with tile is for convolutions, whose output gradients are images; j is for linear layers",
    "Set `j` in place of `tile` for this layer.",
)
MAX_ALL_ENTRIES = Template(
    "max-all-entries", "max with {asked}: there are no more than {size} entries of the output gradient", "Set a smaller `j` or a larger `tile`."
)

# --- the layer before makes all of its channels ---

_WIDE = NOTHING_TO_DO + "the layer before makes all of its channels, also those that are not read here. No value depends on it."
ALL_CHANNELS = Template("all-channels", "all channels of {name} are made: {why}", _WIDE)
PRODUCER_UNFIT = Template("producer-unfit", "it is batched, grouped or without a weight on its right", _WIDE)
CONSUMER_UNFIT = Template("consumer-unfit", "{name} is batched or grouped", _WIDE)
WEIGHT_FROM_ACTIVATION = Template("weight-from-activation", "the weight of {name} is made from it", _WIDE)
READ_TWICE = Template("read-twice", "{name} reads it in other ways, too", _WIDE)
OTHER_CHANNELS = Template("other-channels", "what {name} keeps are not its output channels", _WIDE)
SHARED_GRADIENT = Template("shared-gradient", "its gradient is not that of {name} alone", _WIDE)
GRAPH_OUTPUT = Template("graph-output", "its activation is an output of the graph", _WIDE)
STALE_STATISTICS = Template("stale-statistics", "the running statistics of BatchNorm would go stale", _WIDE)
CHANNEL_NORM = Template("channel-norm", "a normalisation over channels reads its activation", _WIDE)
OTHER_READER = Template("other-reader", "{op} reads its activation as well", _WIDE)
NARROWED_OTHERWISE = Template("narrowed-otherwise", "part of what is behind it is narrowed in another way", _WIDE)
NO_FASTER = Template("no-faster", "fewer would take no less time", _WIDE)
WHOLE_OPERANDS = Template(
    "whole-operands", "{kernel} steps over what was not chosen of whole operands", 'Set `lowering: "inductor"`, which takes narrow operands.'
)
KERNEL_NO_SLOWER = Template("kernel-no-slower", "{kernel} on whole operands is predicted to be no slower", _WIDE)

# --- no units of a layer are left out ---

_UNITS = "Leave the layer out of the rule that sets the method."
UNITS_LAST = Template("units-last", "its units are the model's output", NOTHING_TO_DO + "units are left out of hidden layers.")
UNITS_KIND = Template("units-kind", "it is no linear layer, and units are left out of linear layers only", _UNITS)
UNITS_NO_NONLINEARITY = Template("units-no-nonlinearity", "no nonlinearity is between it and {name}, so that its outputs are no units", _UNITS)
UNITS_UNREAD = Template("units-unread", "no linear layer of this graph reads its units through elementwise ops", _UNITS)
UNITS_READ_TWICE = Template("units-read-twice", "its units are read by {names}, and only one linear layer may read them", _UNITS)
UNITS_ALL_READ = Template("units-all-read", "{name} reads all of its units: {why}", _UNITS)
UNITS_MIXED = Template("units-mixed", "its units are added to other values of the samples before {name} reads them", _UNITS)
UNITS_NO_TABLES = Template(
    "units-no-tables", "its weight is made from something else, and hash tables are those of a parameter", "Use `dropout` or `adaptive_dropout` for it."
)
UNITS_BESIDE = Template("units-beside", "{name} is approximated in another way as well", "Set `method: exact`, or the same method, for that layer.")
