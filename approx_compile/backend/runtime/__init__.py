"""The parts of the backend that act while training runs: the schedule, the search for the ratio of sampled outputs, and state that is saved and loaded."""
