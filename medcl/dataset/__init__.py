"""A folder of scans to cases: layouts, subjects, problems, splits."""
