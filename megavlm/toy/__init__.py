"""Toy bases that already see and speak, the toy world's prepared data, and what a trained toy model is asked."""
