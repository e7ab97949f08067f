"""Register the backend with other libraries. Each library is imported only when its function here is called."""
