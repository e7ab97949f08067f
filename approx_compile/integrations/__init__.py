"""Where other libraries need to be told of the backend. Nothing of them is imported before a function here is called."""
