"""What runs between the steps of compiled code: the schedule, the ratio of outputs, states that are saved and loaded."""
