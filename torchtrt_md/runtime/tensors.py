"""What is asked of tensors in several places of the runtime."""

# TensorRT reads its bindings with vector loads; PyTorch allocates at multiples of this, views may start anywhere.
ALIGNMENT = 256
