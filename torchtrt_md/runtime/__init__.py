"""Run a rank's part of a program: from segments and what was built to a ``Runner`` that is called like the model.

bring_up   a launch, parts and weights -> what a call enqueues; the one way up
runner     a call: check, vote, enqueue, nest the outputs
signature  the arguments and outputs of a call, against the manifest
weights    a rank's weights as its segments read them, held once
steps      what is enqueued one after the other, and what each reads and writes
memory     when each step may run and where its results lie
executor   the steps on two streams
graphs     CUDA graphs of whole calls
engine     one loaded engine: checked against its bindings, then bound and enqueued
collective         exchanges between segments by NCCL
push, store        the same by stores into the memory of other GPUs
rows               what is sent in float8, packed and unpacked
order              which step runs beside which exchange
inductor, epilogue segments that Inductor compiles
selftest   engines of one collective, seen to be right before others are run
offers     what TensorRT offers when engines are loaded: streamed weights, kept kernels
kernels    the kernels that TensorRT-RTX compiled, in a file
timing     how long each step of a call takes, and each layer of an engine
inspect    the layers of an engine
private    the private names of PyTorch that these need
"""
