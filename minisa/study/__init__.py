"""Studies of a model: which layers may share, what that costs, and how to win it back.

It uses the engine; the engine never imports it. `python -m minisa --help` lists the commands.
"""
