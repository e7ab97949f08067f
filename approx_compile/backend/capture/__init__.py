"""Read from Dynamo's graph, before AOTAutograd takes over, the modules and their names, training mode, parameters, and annotations by the user."""
