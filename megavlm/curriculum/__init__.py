"""Several stages as one run: each starts from the weights of the one before, what is finished is not done again."""
