"""The batched log joint of a Pyro model, and runs of the model on many rows."""
