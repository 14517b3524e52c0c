"""What people read: notebooks and their parameters, batch runs, reports, README's tables, the book."""
