"""Reading and writing images: one reader per format, geometry in RAS+ mm."""
