"""Files and folders that are whole at any moment: written aside and renamed, held in the cache.

Imports nothing but the errors.
"""
