"""The risk report: one self-contained HTML file about a panel, its scenarios and what they are good for."""
