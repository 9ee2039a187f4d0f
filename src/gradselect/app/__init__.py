"""The application: recipes, training runs, comparison, reports. The library never imports it."""
