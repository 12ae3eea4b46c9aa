"""What `tools/bench.py` is made of: the cases by us and by others, a process for each, and the report."""
