"""Studies of a model: what its layers may share, what that costs, and how to win it back.

It uses the engine; the engine never imports it. Reached by `python -m minisa search | heal | eval | isotropy`.
"""
