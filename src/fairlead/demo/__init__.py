"""The offline miniature world: a question-and-answer site whose gold score can be computed, and its pipeline."""
