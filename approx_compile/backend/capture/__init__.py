"""What the backend reads from Dynamo's graph before AOTAutograd takes over: modules and their names, training mode, parameters, annotations by the user."""
