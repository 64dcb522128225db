"""What is measured, and how."""

from k5_command import stop_imports_in_one_line

stop_imports_in_one_line("bench")
