"""Recipes for other libraries, one small file each. Each library is imported only by the file that is for it, or when its function there is called."""
