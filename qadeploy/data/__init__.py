"""From files in many shapes to validated examples: formats, fields, loading, checks, repairs, splits."""
