"""FX graphs: reading, writing and changing them; nothing here knows of meshes, engines or ranks.

functional   a graph without in-place ops
rewrite      insert a node, replace one by another
source       the user's own line of a node
text         a canonical text and its digest: equal graphs have equal ones
json         a graph as JSON, and back; whether it is its segment's
schema       the form of that JSON
reader       from it to a graph, believing nothing
allowed      what a graph of a bundle may call
values       whether it says the truth of the shapes of its values
private      every private name of PyTorch that these need
"""
