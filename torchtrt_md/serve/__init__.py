"""A bundle behind a server: what Triton reads of it, and the processes that run it.

config      a manifest -> the model configuration of each of Triton's two backends
shared      a program's inputs and outputs in memory that processes share
supervisor  one process for each rank: started, called, watched, ended
"""
