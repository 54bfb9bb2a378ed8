"""Threads that runs choose against one thread and all threads, and the cost of `import pyro_sb`."""
