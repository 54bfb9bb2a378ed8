"""A learned likelihood p(y | theta) of a simulator, as a site of any Pyro model."""
