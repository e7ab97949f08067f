"""Why no custom kernel (Triton, CUDA C++) runs a product. Inductor then runs it on gathered operands."""

from approx_compile.reasons.reason import NOTHING_TO_DO, Template

_INDUCTOR = NOTHING_TO_DO + 'Inductor runs the sampled product on gathered operands; `lowering` "auto" or "inductor" asks for no kernel here.'

NOT_ON_CUDA = Template("not-on-cuda", "{lowering} needs a CUDA device, the site is on {device}", _INDUCTOR)
NOT_NVIDIA = Template("not-nvidia", "{lowering} has kernels for NVIDIA's devices only", _INDUCTOR)
NO_TRITON = Template("no-triton", "Triton is not installed", "Run `pip install 'approx-compile[triton]'`.")
NO_NVRTC = Template("no-nvrtc", "CUDA C++ can't be compiled ({error})", "Run `pip install 'approx-compile[cuda]'`.")
TRITON_CAPABILITY = Template("triton-capability", "there are Triton kernels for compute capability 8.x and 9.x, the device has {major}.{minor}", _INDUCTOR)
CUDA_CAPABILITY = Template("cuda-capability", "the device has compute capability {has}, and the kernels need {needed}", _INDUCTOR)
KERNEL_DTYPE = Template("kernel-dtype", "{lowering} has no kernel for {dtype}", "Train the layer in bfloat16 or float16 (autocast), if a kernel is to run it.")
NO_TF32 = Template(
    "no-tf32",
    "{lowering} multiplies float32 as TF32, which torch's fp32_precision does not allow",
    'Allow it with `torch.backends.cuda.matmul.fp32_precision = "tf32"` (for convolutions `torch.backends.cudnn.conv.fp32_precision`), or leave it.',
)
KERNEL_BATCHED = Template("kernel-batched", "batched products have no kernel", _INDUCTOR)
KERNEL_ALIGNMENT = Template(
    "kernel-alignment",
    "{lowering} reads lines of whole multiples of {alignment} entries, of inputs and of outputs",
    "Choose widths of the layer that are multiples of 16, if a kernel is to run it.",
)
KERNEL_BIAS = Template("kernel-bias", "the addmm adds no plain bias with one entry for every output", _INDUCTOR)
KERNEL_GROUPS = Template("kernel-groups", "{lowering} skips whole groups of {known}, not {group}{tail}", 'Set such a `group`, or `group: "auto"`.')
KERNEL_CONV_GRADIENT = Template("kernel-conv-gradient", "convolutions' gradients on their own axis have no kernel", _INDUCTOR)
KERNEL_CONV_ZEROS = Template("kernel-conv-zeros", "in a convolution's gradients a kernel leaves out input channels, not output channels", _INDUCTOR)
KERNEL_CONV = Template("kernel-conv", "{lowering} has no kernel for convolutions", 'Set `lowering: "triton"` for convolutions.')
KERNEL_PLAIN_CONV = Template("kernel-plain-conv", "only plain 2-D convolutions without groups have a kernel", _INDUCTOR)
NOT_CHANNELS_LAST = Template(
    "not-channels-last", "its input is not channels-last", "Run the model in channels-last: `model.to(memory_format=torch.channels_last)`, and its input, too."
)
STRIDE_AND_DILATION = Template("stride-and-dilation", "stride and dilation are both above 1, for which the gradient has no kernel", _INDUCTOR)
MAX_KERNEL = Template("max-kernel", "{lowering} has no kernel for max{but}", _INDUCTOR)
MAX_KERNEL_CONV = Template("max-kernel-conv", "only plain 2-D convolutions have a kernel for max", _INDUCTOR)
MAX_KERNEL_TILES = Template("max-kernel-tiles", "the kernel for max takes no tiles", _INDUCTOR)
MAX_KERNEL_ENTRIES = Template("max-kernel-entries", "the kernel for max keeps 1 to {most} entries", "Set a smaller `j`, if a kernel is to run it.")
