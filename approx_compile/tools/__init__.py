"""Tools that are used beside training: the command line, `explain` and its pages, `tune`, and the comparison of two backends."""
