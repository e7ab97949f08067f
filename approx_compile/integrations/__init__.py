"""Registration of the backend with other libraries. These are imported only when a function here is called."""
