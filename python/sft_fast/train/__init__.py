"""Training: the driver (`pipeline`), the ranks (`cluster`, `worker`), and what they share.

Importing this package imports neither torch nor Ray; its modules do, so commands import them when they run.
"""
