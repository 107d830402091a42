"""Everything a person looks at: text, tables, the live view, figures and reports."""
