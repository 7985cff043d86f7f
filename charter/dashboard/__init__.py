"""`charter dashboard`: serve local web pages that show the state of a running Charter.

    serve.py        opens the socket, chooses the token and runs the web server
    app.py          maps each URL to a view, with a JSON version under /api; handles the only action, a retry of dead letters
    security.py     checks Host, Origin and token; sets the content security policy of the pages
    query_cache.py  queries the database, one query at a time; caches each result while the database file does not change
    lag_monitor.py  measures the consumer lag of the stages in a background thread
    pipeline_view.py, traces_view.py, preferences_view.py, training_view.py, dead_letters_view.py, sql_view.py, runs_view.py
                    load the data of each view as plain data; the JSON version contains the same data
    rendering.py    converts this data to HTML; escapes all text and makes invisible characters visible
    charts.py, pipeline_diagram.py
                    draw SVG: charts with units and confidence intervals, and the diagram of the pipeline
    templates/, static/
                    contain the pages (`report.html` is the page of `charter report`), one style sheet and two small scripts

All pages work without the scripts. The scripts refresh the page, switch the theme, and show the value of a chart point when the
mouse is over the point.
"""
