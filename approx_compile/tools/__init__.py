"""What people run beside training: the command line, `explain` and its pages, `tune`, comparisons of two backends."""
