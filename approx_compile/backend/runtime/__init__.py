"""What runs between the steps of compiled code: the schedule, the search for the ratio of sampled outputs, state that is saved and loaded."""
