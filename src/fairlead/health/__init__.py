"""What watches a run and says in words what goes wrong. Reads metrics and run directories; changes nothing."""
