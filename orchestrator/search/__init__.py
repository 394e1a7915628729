"""Sweeps: the space, what proposes trials and stops them, a trial in its process, the record of all of them, and the winner."""
