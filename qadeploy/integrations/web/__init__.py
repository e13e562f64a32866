"""Static sites that answer in the browser."""
