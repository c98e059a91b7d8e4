"""Files of scans to cases, cases to a store of prepared volumes."""
