"""A report as one page: charts, drawing, templates."""
