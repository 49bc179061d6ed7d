"""Pure tensor functions: tensors in, per-example tensors out. Imports torch only; knows no model, config or logger."""
