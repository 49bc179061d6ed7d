"""Trainers held against what they must reach: tasks small enough to be enumerated, their exact optima, and what the
real trainers make of them."""
