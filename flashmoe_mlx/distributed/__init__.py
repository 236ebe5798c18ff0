"""Several machines that share a model, through `mx.distributed`.

Knows groups, which experts a rank has, and how the ranks' results add up; knows no model code and
no store. The collectives and the launcher are MLX's.
"""
