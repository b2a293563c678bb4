"""The ways in: options and messages.  What a door does is on the road (:mod:`torchtrt_md.road`) and in a launch.

export     a model -> a bundle, in one process for all ranks
compile    a model -> a runner, in a launch
load       a bundle -> a runner, in a launch
triton     a bundle -> a model of Triton's; triton_model and triton_rank are what serves it
dynamo     the backend of ``torch.compile``
flat_call  what ``torch.compile`` calls: parameters among the inputs, in sets of weights
agreed     the options of compile and dynamo, read by all ranks together; what does not go together
cli        ``torchtrt-md``
run        ``python -m torchtrt_md.run``
flags      hints of errors in the words of the command line
user_file  the model file that ``torchtrt-md export`` reads
"""
