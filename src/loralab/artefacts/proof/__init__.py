"""Proof of a merge that any tool made: tensor by tensor against the replayed update."""
