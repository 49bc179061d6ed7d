"""What a run will hold, before it runs: the tree of its modules and its memory. Reads configurations, never weights."""
