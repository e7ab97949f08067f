"""What the backend reads while Dynamo is still there: modules and their names, training mode, parameters, layers marked by the user."""
