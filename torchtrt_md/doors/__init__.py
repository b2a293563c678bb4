"""The ways in: options and messages.  What a door does is on the road (:mod:`torchtrt_md.road`) and in a launch.

export    a model -> a bundle, in one process for all ranks
compile   a model -> a runner, in a launch
dynamo    the backend of ``torch.compile``
cli       ``torchtrt-md``
run       ``python -m torchtrt_md.run``
"""
