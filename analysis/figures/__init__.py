"""The pictures of a report: functions that take plain data and return drawn figures; a file for each kind."""
