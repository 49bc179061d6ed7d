"""What `fairlead inspect` measures (measure), draws (rows) and writes (show). Knows no model."""
