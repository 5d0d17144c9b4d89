"""How the tables came to be: one module a step, applied by ``Database.migrate``."""
